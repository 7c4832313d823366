"""What a run takes on a cluster, computed before there is one: time, money, bytes, and what holds it up."""
