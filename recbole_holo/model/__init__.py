"""The models, one file each; each file reads like the method section of its paper."""
