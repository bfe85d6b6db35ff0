"""Train on several nodes: take ranks from srun (`ranks`), submit jobs (`submit`), and check the nodes (`doctor`)."""
