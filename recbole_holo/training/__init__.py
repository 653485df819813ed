"""Training and evaluation on top of RecBole's trainer."""
