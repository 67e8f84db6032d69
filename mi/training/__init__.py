"""Infrastructure shared by all trainers: run directories, checkpoints, logs and sharding."""
