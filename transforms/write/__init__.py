"""Write: responses and error records to Kafka, acknowledged. The formats know no client."""
