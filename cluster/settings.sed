# What is yours to fill in, once: region, account, images, buckets. The files here name them as @NAME@.
# Change the right-hand sides, then render as README.md says. No value may hold a | or an &.
s|@REGION@|us-west-2|g
s|@ACCOUNT_ID@|123456789012|g
s|@AMI_ID@|ami-0123456789abcdef0|g
s|@IMAGE_CPU@|123456789012.dkr.ecr.us-west-2.amazonaws.com/parakeet-batch:0.1.0-cpu|g
s|@IMAGE_CUDA@|123456789012.dkr.ecr.us-west-2.amazonaws.com/parakeet-batch:0.1.0-cuda|g
s|@INPUT_BUCKET@|my-recordings|g
s|@INPUT_PREFIX@|calls/2026|g
s|@OUTPUT_BUCKET@|my-transcripts|g
s|@OUTPUT_PREFIX@|calls-2026|g
s|@MODEL_BUCKET@|my-models|g
s|@MODEL_PREFIX@|parakeet-ctc-0.6b|g
