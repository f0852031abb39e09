"""Starting jobs: on this machine, on hosts, under Slurm, on Kubernetes, in a Ray cluster that runs already."""
