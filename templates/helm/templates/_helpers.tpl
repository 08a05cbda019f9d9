{{- define "sink.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "sink.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sink.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sink.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sink.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "sink.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sink.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "sink.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "sink.topics" -}}
{{- $topics := .Values.config.topics | default .Values.config.topics_regex }}
{{- if kindIs "slice" $topics }}{{ join ", " $topics }}{{ else }}{{ $topics }}{{ end }}
{{- end }}

{{- define "sink.kafkaSecret" -}}
{{- if .Values.existingKafkaSecret }}
{{- .Values.existingKafkaSecret }}
{{- else if .Values.kafkaProperties }}
{{- include "sink.fullname" . }}-kafka
{{- end }}
{{- end }}

{{/* The program's arguments, in the order of their names; numbers as they are written. */}}
{{- define "sink.args" -}}
{{- range $name, $value := .Values.config }}
{{- if kindIs "slice" $value }}
- {{ printf "--%s=%s" $name (join "," $value) | quote }}
{{- else if kindIs "string" $value }}
- {{ printf "--%s=%s" $name $value | quote }}
{{- else }}
- {{ printf "--%s=%s" $name (toJson $value) | quote }}
{{- end }}
{{- end }}
{{- if include "sink.kafkaSecret" . }}
- --kafka_config_file=/etc/beam-lambda-sink/kafka.properties
{{- end }}
- --http=0.0.0.0:{{ .Values.http.port }}
{{- if .Values.http.tokenSecret }}
- --http_token_file=/run/secrets/beam-lambda-sink/token
{{- end }}
{{- end }}
