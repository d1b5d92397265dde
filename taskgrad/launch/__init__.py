"""`tg.main`: one file under mpirun and without it."""
