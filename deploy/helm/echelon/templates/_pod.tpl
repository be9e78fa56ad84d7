{{- define "echelon.pod" -}}
automountServiceAccountToken: false
# Kubernetes would set ECHELON_SERVE_PORT to an address for a Service named echelon-serve.
enableServiceLinks: false
# preStop, then ECHELON_SERVE_DRAIN_S, then the time to stop workers, and a reserve.
terminationGracePeriodSeconds: {{ add .Values.preStopSeconds (ceil .Values.settings.drain_s) 10 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "echelon.selector" . | nindent 8 }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: echelon
    {{- include "echelon.container" . | nindent 4 }}
volumes:
  - name: models
    {{- with .Values.cache.existingClaim }}
    persistentVolumeClaim: {claimName: {{ . }}}
    {{- else }}
    emptyDir: {sizeLimit: {{ .Values.cache.sizeLimit }}}
    {{- end }}
  - name: scratch
    emptyDir: {sizeLimit: {{ .Values.scratch.sizeLimit }}}
  {{- with .Values.apiKeys.secret }}
  - name: keys
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
  {{- with .Values.tls.secret }}
  - name: tls
    secret: {secretName: {{ . }}, defaultMode: 0440}
  {{- end }}
{{- end }}

{{- define "echelon.container" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [{{ .Values.model | quote }}]
env:
  {{- if .Values.apiKeys.secret }}
  - {name: ECHELON_SERVE_API_KEYS, value: /etc/echelon/keys}
  {{- end }}
  {{- if .Values.tls.secret }}
  - {name: ECHELON_SERVE_TLS_CERT, value: /etc/echelon-tls/tls.crt}
  - {name: ECHELON_SERVE_TLS_KEY, value: /etc/echelon-tls/tls.key}
  {{- end }}
  {{- /* As JSON a large number has no exponent. */}}
  {{- range $name, $value := .Values.settings }}
  - {name: ECHELON_SERVE_{{ upper $name }}, value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}}
  {{- end }}
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {name: http, containerPort: 8080}
# The server listens once the model is loaded: its download counts here.
startupProbe:
  httpGet:
    {{- include "echelon.request" (dict "root" . "path" "/health") | nindent 4 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div .Values.startupSeconds 5 }}
livenessProbe:
  httpGet:
    {{- include "echelon.request" (dict "root" . "path" "/health") | nindent 4 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
# /ready scores a pair, which may take ten seconds.
readinessProbe:
  httpGet:
    {{- include "echelon.request" (dict "root" . "path" "/ready") | nindent 4 }}
  periodSeconds: 10
  timeoutSeconds: 12
  failureThreshold: 2
lifecycle:
  preStop:
    # After SIGTERM the server accepts no connections: wait until clients know.
    exec:
      command: [sleep, {{ toString .Values.preStopSeconds | quote }}]
resources:
  requests:
    {{- toYaml (.Values.resources.requests | default .Values.resources.limits) | nindent 4 }}
  limits:
    {{- toYaml .Values.resources.limits | nindent 4 }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: models, mountPath: /var/lib/echelon}
  - {name: scratch, mountPath: /tmp}
  {{- if .Values.apiKeys.secret }}
  - {name: keys, mountPath: /etc/echelon, readOnly: true}
  {{- end }}
  {{- if .Values.tls.secret }}
  - {name: tls, mountPath: /etc/echelon-tls, readOnly: true}
  {{- end }}
{{- end }}
