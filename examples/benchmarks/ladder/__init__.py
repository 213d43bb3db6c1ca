"""The accuracy ladder of ``accuracy.py``: tasks, methods, what runs next, one run, and what is made of the figures."""
