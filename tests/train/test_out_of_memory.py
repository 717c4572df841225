"""Running out of memory ends in one line that names only settings that would help this recipe."""

from typing import Any

import pytest
import torch

from arra.distributed import Ranks
from arra.errors import ArraError
from arra.train.out_of_memory import out_of_memory_told
from arra.train.settings import TrainSettings

ALONE = Ranks()
CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 79.10 GiB of which 12.31 GiB is "
    "free. Including non-PyTorch memory, this process has 66.00 GiB memory in use. Of the allocated memory 65.00 GiB "
    "is allocated by PyTorch, and {unused} is reserved by PyTorch but unallocated."
)


def told(error: BaseException, ranks: Ranks = ALONE, /, *, settings: dict[str, Any] | None = None, **facts: Any) -> str:
    with (
        pytest.raises(ArraError) as caught,
        out_of_memory_told(TrainSettings(steps=1, **(settings or {})), ranks, where="runs/x", **facts),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_a_real_failure_of_the_cpus_allocator():
    with (
        pytest.raises(ArraError) as caught,
        out_of_memory_told(TrainSettings(steps=1, batch_size=32), Ranks(), where="runs/x"),
    ):
        torch.empty(2**50, dtype=torch.uint8)
    assert str(caught.value) == (
        "runs/x: out of memory on the CPU: 1,048,576.00 GiB more were asked for; with the same result: "
        "train.micro_batch_size=16 or train.recompute=full; with another result: train.precision=bfloat16 or "
        "train.optimizer=adamw8bit"
    )


def test_a_device_says_what_was_free_and_can_move_things_to_the_cpu():
    line = told(torch.OutOfMemoryError(CUDA.format(unused="100.00 MiB")), settings={"ema_decay": 0.9})
    assert line.startswith("runs/x: out of memory on cuda:1: 20.00 GiB more were asked for, 12.31 GiB of 79.10 GiB")
    assert " or train.ema_offload=true or " in line
    assert "train.parallel.offload=true; with another result" in line
    assert "expandable_segments" not in line
    assert line.count("fsdp") == 1  # to offload, there is one rank
    split = told(torch.OutOfMemoryError(CUDA.format(unused="9.00 GiB")))
    assert (
        "with the same result: the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True or train." in split
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8.00 PiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_every_way_of_saying_it(error: BaseException):
    assert told(error).startswith("runs/x: out of memory on ")


def test_other_errors_pass():
    error = RuntimeError("shapes cannot be multiplied")
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught,
        out_of_memory_told(TrainSettings(steps=1), Ranks(), where="runs/x"),
    ):
        raise error
    assert caught.value is error


def test_what_is_set_already_is_not_advised():
    everything = {
        "batch_size": 2,
        "micro_batch_size": 1,
        "ema_decay": 0.9,
        "ema_offload": True,
        "recompute": "full",
        "precision": "bfloat16",
        "optimizer": "adamw8bit",
        "parallel": {"kind": "fsdp", "offload": True},
    }
    error = torch.OutOfMemoryError(CUDA.format(unused="0 bytes"))
    line = told(error, Ranks(rank=1, size=2), settings=everything)
    assert line.endswith("; nothing of the recipe is left to save it with: more ranks, or a smaller model")
    assert "out of memory on rank 1 on cuda:1" in line


def test_rows_are_those_of_a_rank():
    line = told(MemoryError(), Ranks(size=3), settings={"batch_size": 32, "micro_batch_size": 64})
    assert "train.micro_batch_size=5 or train.parallel.kind=fsdp or train.recompute=full" in line
    assert "micro_batch_size" not in told(MemoryError(), Ranks(size=32), settings={"batch_size": 32})
    assert "fsdp" not in told(MemoryError(), Ranks(size=3), settings={"parallel": {"kind": "hsdp"}})


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({}, ""),
        (
            {"language_model": "all"},
            " or model.llm.train=lora, model.llm.frozen_dtype=bfloat16 or model.llm.train=lora, "
            "model.llm.frozen_dtype=bfloat16, model.llm.four_bit=true",
        ),
        ({"language_model": "lora"}, " or model.llm.four_bit=true"),
        ({"language_model": "lora", "four_bit": True}, ""),
        ({"language_model": "head"}, ""),
    ],
)
def test_language_models_can_train_less(facts: dict[str, Any], advice: str):
    assert told(MemoryError(), **facts).endswith(f"train.optimizer=adamw8bit{advice}")
