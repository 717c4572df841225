"""What `arra guidance` is asked: which sampling settings are tried, on how many pictures, by which measures.

text of the options --parse_options--> SearchOptions --candidates--> SamplingSettings of every trial
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from arra.errors import ArraError
from arra.evaluate.guidance import Role
from arra.sample.generate import sampling_settings
from arra.sample.logits import SamplingSettings

CFG_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
SCHEDULES = "constant,linear,cosine"
IMAGES = 256
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_SCHEDULE = re.compile(
    r"(?P<kind>constant|linear|cosine|power)(:(?P<power>[\d.]+))?(@(?P<start>[\d.]+)(-(?P<stop>[\d.]+))?)?"
)


@dataclass(frozen=True)
class Budget:
    """What a search may cost: pictures, or seconds of painting and judging."""

    text: str
    pictures: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """One search, as it was asked for; None leaves a choice to the run."""

    cfg_scales: tuple[float, ...] = CFG_SCALES
    schedules: tuple[Mapping[str, Any], ...]
    """Fields of `SamplingSettings`, without the scale."""
    temperatures: tuple[float, ...] | None = None
    """None: the run's own, and 1."""
    top_ks: tuple[int, ...] | None = None
    """None: the run's own."""
    metrics: tuple[str, ...] = ()
    """None named: a distance that no teacher's relative measures, where there is one."""
    spaces: tuple[str, ...] = ()
    """Beside the recipe's judges: names as `arra.evaluate.spaces.open_space` takes them."""
    images: int = IMAGES
    budget: Budget | None = None
    split: str = "validation"
    seed: int = 0
    batch_size: int = 64
    dry_run: bool = False


def parse_options(
    *,
    cfg: str | None = None,
    schedule: str | None = None,
    temperature: str | None = None,
    top_k: str | None = None,
    budget: str | None = None,
    metrics: tuple[str, ...] = (),
    spaces: tuple[str, ...] = (),
    images: int = IMAGES,
    split: str = "validation",
    seed: int = 0,
    batch_size: int = 64,
    dry_run: bool = False,
) -> SearchOptions:
    """The options of the command line.

    Raises:
        ArraError: one of them is not understood, or out of its range.
    """
    top_ks = None if top_k is None else _numbers("--top-k", top_k)
    if top_ks and any(each != int(each) for each in top_ks):
        raise ArraError(f"--top-k {top_k}: expected whole numbers, as in 0,100,1000 (0 is off)")
    options = SearchOptions(
        cfg_scales=CFG_SCALES if cfg is None else _numbers("--cfg", cfg),
        schedules=tuple(parse_schedule(text) for text in (schedule or SCHEDULES).split(",")),
        temperatures=None if temperature is None else _numbers("--temperature", temperature),
        top_ks=None if top_ks is None else tuple(map(int, top_ks)),
        metrics=tuple(dict.fromkeys(metrics)),
        spaces=tuple(dict.fromkeys(spaces)),
        images=images,
        budget=None if budget is None else parse_budget(budget),
        split=split,
        seed=seed,
        batch_size=batch_size,
        dry_run=dry_run,
    )
    candidates(options, SamplingSettings(), num_codes=(2, 2))  # what is out of range is told before a model is read
    return options


def parse_schedule(text: str) -> dict[str, Any]:
    """The fields that a text such as `constant`, `cosine:2`, `power:2.5@0.1` or `constant@0.1-0.8` stands for.

    Behind the colon stands cfg_power, behind the @ cfg_start, and cfg_stop where there is one.

    Raises:
        ArraError: it is no such text.
    """
    match = _SCHEDULE.fullmatch(text.strip())
    try:
        if match is None or (match["power"] and match["kind"] in ("constant", "linear")):
            raise ValueError
        found: dict[str, Any] = {"cfg_schedule": match["kind"], "cfg_power": float(match["power"] or 1.0)}
        found |= {"cfg_start": float(match["start"] or 0.0), "cfg_stop": float(match["stop"] or 1.0)}
    except ValueError:
        raise ArraError(
            f"--schedule {text}: expected constant, linear, cosine, cosine:POWER or power:POWER, and where it is on: "
            "constant@0.1 or constant@0.1-0.8"
        ) from None
    return found


def schedule_text(settings: SamplingSettings) -> str:
    """The text that `parse_schedule` reads."""
    text: str = settings.cfg_schedule
    if settings.cfg_schedule in ("cosine", "power") and settings.cfg_power != 1:
        text += f":{settings.cfg_power:g}"
    if (settings.cfg_start, settings.cfg_stop) != (0, 1):
        text += f"@{settings.cfg_start:g}" + (f"-{settings.cfg_stop:g}" if settings.cfg_stop != 1 else "")
    return text


def parse_budget(text: str) -> Budget:
    """A number of pictures, as 5000, or a time, as 90s, 10min or 2h.

    Raises:
        ArraError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)?", text.strip())
    if match is None or not float(match[1]) or (not match[2] and "." in match[1]):
        raise ArraError(f"--budget {text}: expected pictures, as in 5000, or a time, as in 90s, 10min or 2h")
    if match[2]:
        return Budget(text, seconds=float(match[1]) * SECONDS[match[2]])
    return Budget(text, pictures=int(match[1]))


def candidates(
    options: SearchOptions, own: SamplingSettings, *, num_codes: tuple[int, int]
) -> dict[SamplingSettings, tuple[Role, ...]]:
    """Every setting to try, each once in what it does, with its roles: first `own`, how the run paints by its recipe,
    and the same without guidance. `num_codes` are those of a picture and of the vocabulary.

    Raises:
        ArraError: one is out of its range.
    """
    fields = own.model_dump()
    unguided = {"cfg_scale": 1.0, "cfg_schedule": "constant", "cfg_power": 1.0, "cfg_start": 0.0, "cfg_stop": 1.0}
    asked = itertools.product(
        options.cfg_scales,
        options.schedules,
        options.temperatures or dict.fromkeys((own.temperature, 1.0)),
        (own.top_k,) if options.top_ks is None else options.top_ks,
    )
    found: dict[SamplingSettings, tuple[Role, ...]] = {}
    seen: dict[tuple[Any, ...], SamplingSettings] = {}

    def add(settings: SamplingSettings, roles: tuple[Role, ...]) -> None:
        first = seen.setdefault(effect(settings, *num_codes), settings)
        found[first] = (*found.get(first, ()), *roles)

    add(own, ("before",))
    add(sampling_settings(**{**fields, **unguided}), ("no guidance",))
    for scale, schedule, temperature, top_k in asked:
        told = {"cfg_interval": -1, **schedule, "cfg_scale": scale, "temperature": temperature, "top_k": top_k}
        add(sampling_settings(**{**fields, **told, **(unguided if scale == 1 else {})}), ())
    return found


def effect(settings: SamplingSettings, num_codes: int, vocabulary: int) -> tuple[Any, ...]:
    """What tells settings apart that paint other pictures: the scale at every code, and how codes are drawn."""
    scales = tuple(settings.cfg_scales(num_codes))
    if settings.temperature == 0:
        return (scales, 0.0)
    top_k = settings.top_k if settings.top_k < vocabulary else 0
    return (scales, settings.temperature, top_k, settings.top_p, settings.min_p)


def short_name(settings: SamplingSettings) -> str:
    """Settings in a few words: `cfg 2 cosine:2@0.1, temp 0.7, top-k 100`."""
    guided = "no guidance" if settings.cfg_scale == 1 else f"cfg {settings.cfg_scale:g} {schedule_text(settings)}"
    return ", ".join([guided, *_drawn(settings)])


def _drawn(settings: SamplingSettings) -> Iterator[str]:
    if settings.cfg_interval >= 0 and settings.cfg_scale != 1:
        yield f"interval {settings.cfg_interval}"
    yield f"temp {settings.temperature:g}"
    if settings.top_k:
        yield f"top-k {settings.top_k}"
    if settings.top_p < 1:
        yield f"top-p {settings.top_p:g}"
    if settings.min_p:
        yield f"min-p {settings.min_p:g}"


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = (math.nan,)
    if not all(math.isfinite(each) and each >= 0 for each in found):
        raise ArraError(f"{option} {text}: expected numbers from 0 on, as in 1,1.5,2")
    return found
