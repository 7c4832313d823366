"""Jobs on a cluster from outside: ``vavae submit | jobs | logs | stop``, over the HTTP of Ray Jobs."""
