"""The story of a job, told from what its run's folder holds, as one HTML page."""
