"""Reports of runs, as pages, figures and tables, from the files that runs leave."""
