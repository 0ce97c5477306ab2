"""Peers and us, side by side: the same work, on the same machine, in one run.

`python -m bench` lists the benches; `python -m bench NAME --help` says what one of them takes.
"""
