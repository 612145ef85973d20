"""What is learned: one file per algorithm over `learners.core`. Needs torch alone."""
