"""Messages per second through a worker on SQS and Pub/Sub, over a bare loop and over what else there is."""
