"""Where rows come from: files on a disk, in a bucket, on the Hub, of each kind."""
