"""What a run takes, by formula from model configs: memory, time, traffic."""
