"""What is written down of a step in trouble: sizes, where it began, which records; the same on any number of ranks."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from arra.data.batches import NO_RECORD
from arra.distributed import Ranks
from arra.errors import ArraError
from arra.models.decoder import Decoder, DecoderSettings
from arra.train.settings import TroubleSettings
from arra.train.trouble_record import (
    CHUNK,
    Sizes,
    Trouble,
    TroubleRecord,
    part_of,
    record_trouble,
    sizes_of,
    stop_error,
    trouble_line,
    where_it_began,
)
from tests.train.forked_ranks import on_ranks

ALONE = Ranks()
NAN_LOSS = Trouble(
    step=123,
    position=130,
    reason="nonfinite",
    action="stop",
    losses={"loss": math.nan, "ntp_loss": math.inf},
    grad_norm=-math.inf,
    learning_rate=1e-3,
    recent=[2.0, 1.0],
)


def parameters() -> dict[str, nn.Parameter]:
    """Of two blocks between embeddings and head, weights 2 and gradients 3 everywhere."""
    shapes = {
        "model.tok_embeddings.weight": (5, 2),
        "model.layers.0.attention.wqkv.weight": (3, 2),
        "model.layers.0.norm.weight": (2,),
        "model.layers.1.attention.wqkv.weight": (3, 2),
        "model.output.weight": (5, 2),
        "align.terms.main.projector.net.0.weight": (1, 2),
        "model.lonely": (1,),
    }
    made = {name: nn.Parameter(torch.full(shape, 2.0)) for name, shape in shapes.items()}
    for name, each in made.items():
        each.grad = None if name == "model.lonely" else torch.full_like(each, -3.0)
    return made


def test_sizes_tell_finite_numbers_from_others():
    found = sizes_of(torch.tensor([[3.0, -4.0], [math.nan, math.inf]]))
    assert found == Sizes(count=4, squares=25.0, largest=4.0, nonfinite=2)
    assert (found.norm, found.rms) == (5.0, math.sqrt(12.5))
    assert sizes_of(torch.empty(0, 3)) == Sizes()  # a shard of a tensor with fewer rows than ranks
    assert sizes_of(torch.full((3,), 1e30)).norm == pytest.approx(math.sqrt(3) * 1e30)  # its square is no float32
    long = torch.ones(CHUNK + 7)
    long[-1] = math.nan
    assert sizes_of(long) == Sizes(CHUNK + 7, CHUNK + 6.0, 1.0, 1)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.attention.wo.weight", "layers.3"),
        ("model.lm.model.layers.11.mlp.up_proj.weight", "lm.model.layers.11"),
        ("model.lm.transformer.h.2.ln_1.bias", "lm.transformer.h.2"),
        ("model.tok_embeddings.weight", "tok_embeddings"),
        ("model.output.weight", "output"),
        ("model.lonely", "lonely"),
        ("align.terms.main.projector.layers.0.weight", "align.terms.main"),
    ],
)
def test_parameters_belong_to_blocks_terms_or_modules(name: str, part: str):
    assert part_of(name) == part


def test_every_parameter_of_a_model_belongs_to_some_part():
    model = Decoder(DecoderSettings(num_codes=8, grid=(2, 2), hidden_size=16, num_heads=2, num_layers=3, num_classes=2))
    parts = {part_of(f"model.{name}") for name, _ in model.named_parameters()}
    assert {"tok_embeddings", "layers.0", "layers.1", "layers.2", "norm", "output"} < parts
    assert len(parts) == 7  # and the condition's embedding


def where(**bad: Sequence[int]) -> str:
    """Three parts and layers 0..2; those of the given places hold something that is not finite."""

    def sizes(kind: str) -> dict[Any, Sizes]:
        names = range(3) if kind == "layers" else ("a", "b", "c")
        return {name: Sizes(4, float(place), 1.0, int(place in bad.get(kind, ()))) for place, name in enumerate(names)}

    return where_it_began(weights=sizes("weights"), gradients=sizes("gradients"), layers=sizes("layers"))


def test_it_began_where_the_passes_met_it_first():
    assert where(gradients=[0, 1]) == "first non-finite gradients in b"  # the backward pass comes from the head
    assert where(gradients=[0, 1, 2], layers=[1, 2]) == "first non-finite states after block 1"
    assert where(gradients=[0, 1, 2], layers=[0, 1, 2]) == "first non-finite states in the embeddings"
    assert where(gradients=[0], layers=[1], weights=[1, 2]) == "non-finite weights in b"
    assert where() == "all gradients are finite, the largest are in c"


def test_the_file_has_everything_in_plain_json(tmp_path: Path):
    own = parameters()
    gradient = own["model.layers.1.attention.wqkv.weight"].grad
    assert gradient is not None
    gradient[0, 1] = math.nan
    record = record_trouble(NAN_LOSS, tmp_path, ranks=ALONE, parameters=own, rows=torch.tensor([7, 9]))
    assert record.path == tmp_path / "trouble" / "step-0000123-batch-0000130.json"
    assert record.records == ("7", "9")

    def refuse(word: str) -> None:
        raise AssertionError(word)  # NaN and Infinity are no JSON

    content = json.loads(record.path.read_text(), parse_constant=refuse)
    assert content["losses"] == {"loss": "nan", "ntp_loss": "inf"}
    assert content["grad_norm"] == "-inf"
    assert content["recent"] == [2.0, 1.0]
    assert content["began"] == record.began == "first non-finite gradients in layers.1"
    assert [part["name"] for part in content["parts"]] == [
        "tok_embeddings",
        "layers.0",
        "layers.1",
        "output",
        "align.terms.main",
        "lonely",
    ]
    assert content["parts"][1] == {
        "name": "layers.0",
        "numbers": 8,
        "weight_norm": math.sqrt(8 * 4),
        "grad_norm": math.sqrt(8 * 9),
        "largest_gradient": 3.0,
        "nonfinite_gradients": 0,
        "nonfinite_weights": 0,
    }
    assert content["parts"][2]["nonfinite_gradients"] == 1
    assert content["parts"][2]["grad_norm"] == math.sqrt(5 * 9)  # of the finite ones
    assert content["parts"][5]["grad_norm"] == 0.0


def test_each_batch_has_a_file_of_its_own(tmp_path: Path):
    trouble = [Trouble(**{**vars(NAN_LOSS), "step": 5, "position": position}) for position in (5, 6)]
    paths = [record_trouble(each, tmp_path, ranks=ALONE, parameters={}).path.name for each in trouble]
    assert paths == ["step-0000005.json", "step-0000005-batch-0000006.json"]


def test_states_name_the_records_that_made_the_trouble(tmp_path: Path):
    def states():
        for start in (0, 2):  # two micro-batches of two rows, then rows of text, which are no records
            first, second = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
            if start == 2:
                first[1, 2, 0] = math.inf
                second[:] = math.nan
            yield {0: torch.ones(2, 3, 4), 1: first, 2: second}
        yield {0: torch.ones(1, 3, 4), 1: torch.full((1, 3, 4), math.nan), 2: torch.ones(1, 3, 4)}

    record = record_trouble(
        NAN_LOSS,
        tmp_path,
        ranks=ALONE,
        parameters=parameters(),
        rows=torch.tensor([40, 41, 42, 43, NO_RECORD]),
        ids=lambda rows: [f"picture-{row}" for row in rows],
        states=states(),
    )
    assert record.began == "first non-finite states after block 1"
    assert record.records == ("picture-43",)
    content = json.loads(record.path.read_text())
    assert content["records"] == [f"picture-{row}" for row in range(40, 44)]
    assert content["records_with_nonfinite_states"] == ["picture-43"]
    assert [each["nonfinite"] for each in content["states"]] == [0, 13, 24]
    assert content["states"][0] == {"layer": 0, "rms": 1.0, "largest": 1.0, "nonfinite": 0}


def told(trouble: Trouble, **facts: Any) -> str:
    run = Path("runs/x")
    record = TroubleRecord(run / "trouble" / "step-0000123.json", "first non-finite gradients in layers.3", ("a", "b"))
    given = {"checkpoint": 100, "settings": TroubleSettings(), "survived": 0, **facts}
    return str(stop_error(trouble, record, run=run, **given))


def test_the_line_that_stops():
    assert told(NAN_LOSS) == (
        "runs/x: step 123: loss is nan (batch 130, records a, b); first non-finite gradients in layers.3; saved in "
        "trouble/step-0000123.json; the checkpoint of step 100 is whole; lower train.learning_rate, or set "
        "train.trouble.nonfinite: rewind"
    )
    spike = Trouble(**{**vars(NAN_LOSS), "reason": "spike", "losses": {"loss": 12.0}})
    line = told(spike, checkpoint=None, settings=TroubleSettings(spike="stop"))
    assert "step 123: loss rose to 12 from 1.5 (batch" in line
    assert line.endswith("; there is no checkpoint yet; lower train.learning_rate, or set train.trouble.spike: rewind")
    assert "step 123: gradient norm is -inf (batch" in told(Trouble(**{**vars(NAN_LOSS), "losses": {"loss": 1.0}}))
    losses = {"loss": math.nan, "ntp_loss": 2.0, "gva_loss.main": math.nan}
    assert "step 123: loss is nan, of gva_loss.main (batch" in told(Trouble(**{**vars(NAN_LOSS), "losses": losses}))
    worn = told(NAN_LOSS, settings=TroubleSettings(nonfinite="skip", most=3), survived=3)
    assert "training went on after trouble 3 times, as often as train.trouble.most allows; lower train.le" in worn


def test_a_line_names_some_records_or_none():
    many = TroubleRecord(Path("r/trouble/x.json"), "there", tuple(map(str, range(9))))
    assert "(batch 130, records 0, 1, 2, 3, 4, 5, 6, 7, ...); there" in trouble_line(NAN_LOSS, many, run=Path("r"))
    none = TroubleRecord(Path("r/trouble/x.json"), "there", ())
    assert "(batch 130); there" in trouble_line(NAN_LOSS, none, run=Path("r"))


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "trouble").write_text("a file where the folder should be")
    with pytest.raises(ArraError, match="is a file, expected a folder"):
        record_trouble(NAN_LOSS, tmp_path, ranks=ALONE, parameters=parameters())


def record_on(ranks: Ranks, run: Path, gradients: Mapping[str, Tensor]) -> None:
    """Writes trouble of a batch of four records, the last one of which the model cannot bear, and what it found."""
    model, (first, _), inputs = troubled()
    if ranks.size > 1:
        fully_shard(first)  # 3 rows on 2 ranks; the other block is whole
    parameters = {f"model.{name}": each for name, each in model.named_parameters()}
    for name, each in parameters.items():
        gradient = gradients[name]
        each.grad = (
            distribute_tensor(gradient, each.device_mesh, each.placements) if isinstance(each, DTensor) else gradient
        )
    rows = torch.arange(4).tensor_split(ranks.size)[ranks.rank]
    with torch.no_grad():
        hidden = first(inputs[rows])
    found = record_trouble(
        Trouble(3, 3, "nonfinite", "skip", {"loss": 1.0}, 1.0, 0.1, []),
        run,
        ranks=ranks,
        parameters=parameters,
        rows=rows,
        ids=lambda numbers: [f"r{number}" for number in numbers],
        states=[{1: hidden[:, None] * 1e10}],
    )
    assert found.path == run / "trouble" / "step-0000003.json"
    assert found.began == "first non-finite states after block 1"
    assert found.records == ("r3",)
    with pytest.raises(ArraError, match=r"expected a folder|part of this path"):  # on all ranks
        record_trouble(NAN_LOSS, found.path, ranks=ranks, parameters={})


def troubled() -> tuple[nn.Module, tuple[nn.Linear, nn.Linear], Tensor]:
    """A model, its two blocks, and inputs of which one is far too large."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 4)
    inputs[3, 0] = 1e30
    blocks = nn.Linear(4, 3), nn.Linear(3, 1)
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)}), blocks, inputs


def flat(content: Any) -> Tensor:
    return torch.tensor([value for part in content["parts"] + content["states"] for value in list(part.values())[1:]])


def test_two_ranks_write_what_one_does(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    model, (first, second), inputs = troubled()
    second(first(inputs)).sum().backward()
    gradients = {f"model.{name}": each.grad for name, each in model.named_parameters() if each.grad is not None}
    record_on(ALONE, one, gradients)
    assert on_ranks(2, tmp_path / "store", lambda ranks: record_on(ranks, two, gradients)) == [0, 0]
    contents = [json.loads((run / "trouble" / "step-0000003.json").read_text()) for run in (one, two)]
    assert contents[0]["records"] == contents[1]["records"] == ["r0", "r1", "r2", "r3"]
    torch.testing.assert_close(flat(contents[0]), flat(contents[1]), rtol=1e-5, atol=0)
