"""The local cloud: LocalStack (SQS, SNS, S3) and the Pub/Sub emulator, with and without containers.

`localstack/up` and `localstack/down` are its command line, the test fixtures `aws` and `gcp` its other user.
"""
