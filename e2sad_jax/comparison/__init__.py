"""Every defense at the same number of updates: robust accuracy in the worst case against what training cost."""
