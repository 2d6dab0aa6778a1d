"""Where do bytes come from: files, disks, memory, and the way from threads to the loop."""
