"""What becomes of acknowledged changes when something fails: processes, disks, databases."""
