"""Put the results into the store, each whole or not at all."""

from job.publish.place import claimed
from job.publish.run import directory, done, finished, merged, progress, tidied, trained

__all__ = ["claimed", "directory", "done", "finished", "merged", "progress", "tidied", "trained"]
