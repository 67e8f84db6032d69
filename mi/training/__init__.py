"""What every trainer needs: run directories, checkpoints, logs, sharding."""
