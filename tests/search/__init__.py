"""
A random search over valid configurations: `python -m tests.search --seed S --configurations 300 [--processes 2]`.

`settings.py` draws configurations, `runs.py` trains them on tiny models and watches from outside what reaches the loss,
`promises.py` holds what must be true of that, by code of its own, and `search.py` puts the three together.
"""
