"""Whether the run URL is ours: the config that the run was begun with, and if this one may go on with it."""

from collections.abc import Callable

from job import config, errors, log, paths
from job.config import Config
from job.storage import Store


def agree(store: Store, ours: Config) -> int:
    """Refuse to go on with a config that differs from the one that made what is already under the run URL.

    Returns the attempt that the run began with. Raises `errors.ConfigError` with every key that differs.
    """
    there = store.read(paths.CONFIG)
    if there is None and _has_results(store):
        raise errors.ConfigError(
            f"{store.url} holds results but no {paths.CONFIG} that says what they were made with: put it back "
            "(`validate --json` prints it), or use another run.url"
        )
    if there is None:
        return 0
    changed = config.differences(ours, there.data)
    if changed and _has_results(store):
        listed = "\n".join(f"  {line}" for line in changed)
        raise errors.ConfigError(
            f"{store.url} holds a run with another config:\n{listed}\nUse another run.url for another run, "
            f"or the config kept in {store.url}/{paths.CONFIG}; `--restart` begins the run under this one anew"
        )
    return config.began(there.data)


def claim(store: Store, ours: Config, number: int, confirm: Callable[[], None], *, restart: bool) -> int:
    """Keep the config under the run URL for attempt `number`, which owns the run (see `lease`).

    With `restart` the run begins anew, also with another config: what was published stays until it is replaced, and
    nothing else of it is used. Returns the attempt that the run began with.

    It is written anew by each owner, so that a late write of the one before finds another version, and loses. Raises
    what `agree` does.
    """
    if not restart:
        agree(store, ours)  # once more: another start may have been at work since
    there = store.read(paths.CONFIG)
    confirm()
    began = number if restart else config.began(there.data) if there else 0
    kept = config.claimed(ours, began, number)
    if there is None:
        store.create(paths.CONFIG, kept)
        return began
    if config.differences(ours, there.data) or restart:
        why = "the run begins anew" if restart else "nothing had been made with the old one"
        log.warn("config.replaced", f"the config under {store.url} is replaced: {why}")
    store.replace(paths.CONFIG, kept, there.version)
    return began


def kept(store: Store) -> Config:
    """The config of the run in `store`; raises `errors.ConfigError` if there is none."""
    there = store.read(paths.CONFIG)
    if there is None:
        raise errors.ConfigError(f"{store.url} holds no {paths.CONFIG}: it is not the URL of a run")
    return config.parse(there.data.decode(), f"{store.url}/{paths.CONFIG}")


def _has_results(store: Store) -> bool:
    return any(
        store.list(place) for place in (paths.CHECKPOINTS, paths.ADAPTER, paths.MERGED, paths.REPORT, paths.DONE)
    )
