"""What a run, or several, have shown: tables, plots and the summary at the end. Reads run folders, nothing else."""
