"""From batches to weights. In the order of reading:

    settings, durations      what a recipe may say of a training
    loop                     a step from its batch to what is logged and saved; all else is called from here
    passes, objective        a rank's rows in micro-batches, forward and backward; losses of the whole batch
    parallel                 DDP, FSDP2, recomputation, compilation, around a model that knows nothing of them
    alignment                the terms of `arra.align` from settings and features
    optimizer, schedule, average         what moves the weights, how far, and their averages
    checkpoints, shards, optimizer_state     what is kept on the disk, whole or not at all
    trouble, trouble_record, interrupt, heartbeat    losses that are no numbers, signals, ranks that hang
    meters, trackers, watch  speed and memory, metrics elsewhere, what states know of a teacher
    memory, activations, savings, out_of_memory      what a training takes of a device, and what takes less
    flops                    operations as they are made, for equal compute

Beside the loop of models stand that of image tokenizers (`tokenizer`, with `pictures`, `discriminator`, `perceptual`)
and that of the judge of captions (`dual`).
"""
