"""The only package that knows RecBole's insides: when RecBole moves, this folder is what changes."""
