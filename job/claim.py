"""Whether the run URL is ours: the config that the run was begun with, and if this one may go on with it."""

from job import config, errors, log, paths
from job.config import Config
from job.storage import Store


def agree(store: Store, ours: Config) -> None:
    """Refuse to go on with a config that differs from the one that made what is already under the run URL.

    Raises `errors.ConfigError` with every key that differs.
    """
    there = store.read(paths.CONFIG)
    if there is None and _has_results(store):
        raise errors.ConfigError(
            f"{store.url} holds results but no {paths.CONFIG} that says what they were made with: put it back "
            "(`validate --json` prints it), or use another run.url"
        )
    if there is None:
        return
    changed = config.differences(ours, there.data)
    if changed and _has_results(store):
        listed = "\n".join(f"  {line}" for line in changed)
        raise errors.ConfigError(
            f"{store.url} holds a run with another config:\n{listed}\nUse another run.url for another run, "
            f"or the config kept in {store.url}/{paths.CONFIG}"
        )


def claim(store: Store, ours: Config) -> None:
    """Keep the config under the run URL; only the owner of the run may (see `lease`). Raises what `agree` does."""
    agree(store, ours)  # once more: another start may have been at work since
    there = store.read(paths.CONFIG)
    if there is None:
        store.create(paths.CONFIG, config.claimed(ours))
    elif config.differences(ours, there.data):  # `agree` has seen that nothing was made with the old one
        store.replace(paths.CONFIG, config.claimed(ours), there.version)
        log.warn(
            "config.replaced", f"the config under {store.url} was replaced: nothing had been made with the old one"
        )


def _has_results(store: Store) -> bool:
    return any(
        store.list(place) for place in (paths.CHECKPOINTS, paths.ADAPTER, paths.MERGED, paths.REPORT, paths.DONE)
    )
