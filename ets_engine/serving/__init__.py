"""Many searches on one pair of models: jobs, the scheduler that advances them together, and the thread it runs in."""

from ets_engine.serving.job import Job, in_callback
from ets_engine.serving.scheduler import Models, Scheduler
from ets_engine.serving.worker import Worker

__all__ = ["Job", "Models", "Scheduler", "Worker", "in_callback"]
