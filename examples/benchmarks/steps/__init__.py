"""What ``overhead.py`` runs: candidates in interpreters of their own, what is switched off in them, and the tables."""
