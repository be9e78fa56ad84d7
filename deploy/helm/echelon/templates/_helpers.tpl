{{- define "echelon.selector" -}}
app.kubernetes.io/name: echelon
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "echelon.labels" -}}
{{ include "echelon.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "echelon.metadata" -}}
name: {{ .Release.Name }}
labels:
  {{- include "echelon.labels" . | nindent 2 }}
{{- end }}

{{- /* A probe's request; plain HTTP is what Kubernetes takes by default. */}}
{{- define "echelon.request" -}}
path: {{ .path }}
port: http
{{- with .root.Values.tls.secret }}
scheme: HTTPS
{{- end }}
{{- end }}
