"""Converted networks in the forms that run elsewhere: signs packed into words, files that hold nothing else."""
