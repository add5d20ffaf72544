"""Which jobs of one cluster run now, where, and with how many workers. Decisions are values; `launch/scheduler.py`
causes them on a cluster, `simulate.py` in a trace, both by the same functions."""
