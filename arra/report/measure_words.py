"""What a person calls the measures of a card, and what each means: one table for all pages and for the terminal.

Place in the pipeline: below every page of this room.
"""

from collections.abc import Mapping

MEASURES: Mapping[str, tuple[str, str]] = {
    "nll": ("NLL", "Negative log-likelihood of the held-out picture's codes given its caption. Lower is better."),
    "validation_nll": (
        "Validation NLL",
        "Negative log-likelihood of the validation pictures' codes given their captions, after training. Lower is "
        "better.",
    ),
    "caption_gain": (
        "Caption gain",
        "How much worse the codes are predicted with another picture's caption. Higher: the model reads its caption.",
    ),
    "class_gain": (
        "Class gain",
        "How much worse the codes are predicted with another class. Higher: the model heeds its class.",
    ),
    "frechet": (
        "Fréchet distance",
        "Distance between Gaussians fitted to the features of generated and of reference pictures. Lower is better.",
    ),
    "kid_x1000": (
        "Kernel distance",
        "Unbiased kernel distance (KID, x1000) between the same features; chance can push it below 0. Lower is better.",
    ),
    "caption_frechet": (
        "Fréchet distance, caption judge",
        "The same distance in the caption judge's picture space, which no photograph and no other encoder has shaped. "
        "Lower is better.",
    ),
    "caption_kid_x1000": (
        "Kernel distance, caption judge",
        "The same kernel distance in the caption judge's picture space. Lower is better.",
    ),
    "retrieval_at_1": (
        "Retrieval, nearest",
        "Share of generated pictures whose nearest reference is the one of their own caption. Higher is better.",
    ),
    "retrieval_at_10": (
        "Retrieval, top ten",
        "Share of generated pictures whose own reference is among the ten nearest. Higher is better.",
    ),
    "caption_retrieval_at_1": (
        "Caption retrieval, first",
        "Share of generated pictures of which the caption judge ranks their own caption first. Higher is better.",
    ),
    "caption_retrieval_at_10": (
        "Caption retrieval, top ten",
        "Share of generated pictures whose own caption the caption judge ranks among the first ten: a small encoder of "
        "captions and pictures trained from nothing on the training split alone. Higher is better.",
    ),
    "class_retrieval_at_1": (
        "Class retrieval, first",
        "Share of generated pictures that are nearest to the mean of their own class's references. Higher is better.",
    ),
    "psnr_db": ("PSNR", "Likeness of a picture to itself after the tokenizer, in decibels. Higher is better."),
    "bits_per_token": (
        "Bits per token",
        "What the model needs to tell a held-out picture's code, given its caption. Lower is better.",
    ),
    "fid": ("FID", "Fréchet distance of Inception features to those of the reference. Lower is better."),
    "sfid": ("sFID", "Fréchet distance of early, spatial Inception features. Lower is better."),
    "fd": ("Fréchet distance", "Between features of this space, as FID is of Inception's. Lower is better."),
    "fid_infinity": ("FID, extrapolated", "What FID would be with endlessly many pictures. Lower is better."),
    "fd_infinity": ("Fréchet, extrapolated", "What it would be with endlessly many pictures. Lower is better."),
    "cmmd": ("CMMD", "Kernel distance of CLIP embeddings, x1000. Lower is better."),
    "inception_score": ("Inception Score", "How sure and how varied the pictures' classes are. Higher is better."),
    "precision": ("Precision", "Share of pictures within the reference's neighbourhoods. Higher is better."),
    "recall": ("Recall", "Share of reference pictures within the set's neighbourhoods. Higher is better."),
    "density": ("Density", "How many reference neighbourhoods a picture lies in, over k. Higher is better."),
    "coverage": ("Coverage", "Share of reference pictures with a picture in their neighbourhood. Higher is better."),
    "clip_score": ("CLIP-Score", "Cosine of picture and prompt. Higher is better."),
    "clip_score_x100": ("CLIP-Score x100", "The same cosine x100, negative ones as 0. Higher is better."),
    "ms_ssim": ("MS-SSIM", "Likeness to the real picture of the same prompt. Higher is better."),
    "ms_ssim_within": ("MS-SSIM within", "Likeness of the set's pictures to one another. Lower is more varied."),
    "findings_auroc": (
        "Findings, AUROC",
        "How well a classifier finds in the picture what its prompt asked for; 0.5 is chance. Higher is better.",
    ),
    "accuracy": ("Accuracy", "Share of pictures that show what their prompt asked for. Higher is better."),
    "copied": (
        "Copied",
        "Share of pictures whose nearest training picture is nearer than held-out real pictures are. Lower is better.",
    ),
}


def measure_name(metric: str) -> str:
    """What a person calls a metric of a card: `FID`, `Findings, AUROC: Effusion`."""
    whole, _, part = metric.partition(".")
    name = MEASURES[whole][0] if whole in MEASURES else whole.replace("_", " ")
    return f"{name}: {part.replace('_', ' ')}" if part else name


def measure_meaning(metric: str) -> str:
    """What it means, in a sentence; empty for one that no list has."""
    whole = metric.partition(".")[0]
    return MEASURES[whole][1] if whole in MEASURES else ""
