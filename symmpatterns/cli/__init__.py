"""The commands of ``python -m symmpatterns``, one module each."""
