"""What `ranking.py` is made of."""
