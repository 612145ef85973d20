"""How it runs: command line, configuration, loop, backends, checkpoints, telemetry."""
