"""One file under mpirun, on local workers, or in one process."""
