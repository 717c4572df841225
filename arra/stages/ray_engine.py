"""Preparation on many machines: Ray Data hands shards to actors that run the same pass, onto a shared folder.

What an actor does with a shard is `arra.stages.passes.Pass`, so the store is the one that the local engine makes.
"""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from arra.errors import ArraError
from arra.stages.passes import Pass, PassPlan, ShardDone

SMALL_LOGS = {"RAY_DEDUP_LOGS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class ShardActor:
    """Makes one shard at a time; the networks stay loaded between shards."""

    def __init__(self, plan: PassPlan) -> None:
        self.work = Pass(plan)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """What was made of the shard that the row names."""
        (done,) = self.work.run([int(row["shard"])])
        return asdict(done)


def run_on_ray(plan: PassPlan, shards: Sequence[int], *, on_batch: Callable[[int, float], None]) -> Iterator[ShardDone]:
    """Each shard as an actor has made it, in any order.

    `plan.workers` actors, each with one CPU (or one GPU, where the device is one). The cluster is the one that
    RAY_ADDRESS names, else one on this machine. The store's folder and the pictures must be reachable everywhere.

    Raises:
        ArraError: Ray is not installed, or no cluster can be reached.
    """
    if not shards:
        return
    for name, value in SMALL_LOGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ArraError(
            "--engine ray: the package 'ray' is missing; pip install 'arra[ray]' -c constraints.txt, or use "
            "--engine local"
        ) from error
    if not ray.is_initialized():
        _refuse_unreachable(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ArraError(f"--engine ray: no cluster at RAY_ADDRESS ({str(error).splitlines()[0]})") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    # an actor loads in its own process: many actors are the parallelism here
    alone = replace(plan, store=plan.store.resolve(), workers=0, again=frozenset())
    actors = max(1, min(plan.workers, len(shards)))
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    made = rows.map(
        ShardActor,  # type: ignore[arg-type]
        fn_constructor_args=(alone,),
        concurrency=actors,
        num_cpus=1,
        num_gpus=1 if plan.device.startswith("cuda") else None,
    )
    waited = 0.0
    for row in made.iter_rows():
        done = ShardDone(**row)
        waited += done.waiting_seconds / actors
        on_batch(done.records, waited)
        yield done


def _refuse_unreachable(address: str) -> None:
    """Nothing; a cluster that does not answer is told now, where Ray would wait for minutes.

    Raises:
        ArraError: nobody listens at the address.
    """
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if match is None:  # none given, or `auto`: Ray looks on this machine
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        raise ArraError(f"--engine ray: no cluster at RAY_ADDRESS {address} ({error}); start it or unset it") from error
