"""What a run tells while it goes on: console, metrics, events, cast statistics, trackers. Reports on a run's
records are made in :mod:`fp8train.reporting`."""
