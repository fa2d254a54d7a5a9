"""From the names on the command line to a fleet: everything is looked up and judged before anything is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from models.gguf.header import read_meta
from models.store.store import Store, StoredModel

from .config import RuntimeConfig
from .engine_options import EngineOptions
from .errors import LoadFailed
from .fleet import Fleet, FleetOptions
from .fleet_model import Host
from .memory import machine_budget, model_need
from .served import ServedModel, load_model
from .served_names import Wanted, find


def open_fleet(names: Sequence[str], config: RuntimeConfig, store: Store) -> Fleet:
    """The models `names`, none loaded yet; the first of them answers requests that name none.

    Raises what `find` raises, BadGguf, or LoadFailed if two different models have one name.
    """
    by_base: dict[Path, dict[str, Wanted]] = {}
    seen: dict[str, Wanted] = {}
    for name in names:
        wanted = find(name, store)
        known = seen.setdefault(wanted.id, wanted)
        if known.base.gguf.resolve() != wanted.base.gguf.resolve():
            files = f"{str(known.base.gguf)!r} and {str(wanted.base.gguf)!r}"
            raise LoadFailed(f"two models would be served as {wanted.id!r}: {files}; rename one of the files")
        by_base.setdefault(wanted.base.gguf.resolve(), {})[wanted.id] = wanted

    def load(stored: StoredModel, adapters: Mapping[str, Path]) -> ServedModel:
        return load_model(stored, config, adapters)

    hosts = [_host(tuple(wanted.values()), config) for wanted in by_base.values()]
    budget = machine_budget() if config.memory_budget is None else int(config.memory_budget * 2**30)
    return Fleet(hosts, load, FleetOptions(budget, config.slots + config.queue, config.idle_minutes * 60))


def _host(wanted: tuple[Wanted, ...], config: RuntimeConfig) -> Host:
    stored = wanted[0].base
    meta = read_meta(stored.gguf)
    if meta.is_adapter:
        raise LoadFailed(f"{str(stored.gguf)!r} is a LoRA adapter and no model; install it and serve it as BASE:NAME")
    files = {stored.gguf, *(path for one in wanted for path in one.adapters.values())}
    options = EngineOptions(step_tokens=config.step_tokens, max_running=config.slots)
    size_bytes = sum(file.stat().st_size for file in files)
    return Host(stored, wanted, model_need(meta, size_bytes, n_ctx=config.context, n_rows=options.n_seq_max), meta)
