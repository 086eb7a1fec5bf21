"""What outlives a request: files, jobs and their database."""
