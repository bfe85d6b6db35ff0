"""Several nodes: ranks under srun (`ranks`), jobs (`submit`), and whether the nodes are fit for it (`doctor`)."""
