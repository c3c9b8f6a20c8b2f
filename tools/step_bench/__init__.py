"""The parts of tools/bench_step.py: models and clips (worlds), the clock, and the rivals."""
