{{/* Labels of an object: dict root, component. */}}
{{- define "claas.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{ include "claas.selector" . }}
{{- end }}

{{/* Labels that select the Pods of a component: dict root, component. */}}
{{- define "claas.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Name of a cluster-wide object: dict root, name. Two releases of one name may live in two namespaces. */}}
{{- define "claas.clusterName" -}}
{{ .root.Release.Namespace }}-{{ .root.Release.Name }}-{{ .name }}
{{- end }}

{{/* An image's reference: dict root, name (operator, worker, teacher). What has a tag or digest of its own is left alone. */}}
{{- define "claas.image" -}}
{{- $image := .root.Values.image -}}
{{- $name := get $image .name -}}
{{- $last := splitList "/" $name | last -}}
{{- if or (contains ":" $last) (contains "@" $last) -}}
{{ $name }}
{{- else -}}
{{ with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ $name }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* What every Pod has: the restricted Pod Security Standard. Argument: root. */}}
{{- define "claas.podSecurity" -}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  seccompProfile: {type: RuntimeDefault}
  {{- with .Values.podSecurityContext }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "claas.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Where a Pod may run: a map with nodeSelector, tolerations, affinity, priorityClassName, runtimeClassName. */}}
{{- define "claas.placement" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" "runtimeClassName" }}
{{- with get $ $key }}
{{ $key }}:{{ if kindIs "string" . }} {{ . }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Environment that the user added: dict root, own (a map with extraEnv). */}}
{{- define "claas.extraEnv" -}}
{{- with concat .root.Values.extraEnv (.own.extraEnv | default list) }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "claas.extraVolumes" -}}
- name: tmp
  emptyDir: {}
{{- with concat .root.Values.extraVolumes (.own.extraVolumes | default list) }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "claas.extraVolumeMounts" -}}
- {name: tmp, mountPath: /tmp}
{{- with concat .root.Values.extraVolumeMounts (.own.extraVolumeMounts | default list) }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "claas.endpoint" -}}
{{- if .Values.storage.endpoint -}}
{{ .Values.storage.endpoint }}
{{- else if .Values.seaweedfs.enabled -}}
http://{{ .Release.Name }}-seaweedfs.{{ .Release.Namespace }}.svc:8333
{{- end -}}
{{- end }}

{{/* Name of the Secret with the store's credentials; empty: workload identity. */}}
{{- define "claas.credentialsSecret" -}}
{{- $given := .Values.storage.credentials -}}
{{- if $given.existingSecret -}}
{{ $given.existingSecret }}
{{- else if or $given.accessKeyId .Values.seaweedfs.enabled -}}
{{ .Release.Name }}-storage
{{- end -}}
{{- end }}

{{/* The store as boto3's own environment: dict root, secret (name, may be empty). */}}
{{- define "claas.storageEnv" -}}
{{- with include "claas.endpoint" .root }}
- {name: AWS_ENDPOINT_URL_S3, value: {{ quote . }}}
{{- end }}
- {name: AWS_REGION, value: {{ .root.Values.storage.region | quote }}}
{{- with .root.Values.storage.addressing | default "auto" }}
{{- if ne . "auto" }}
- {name: CLAAS_S3_ADDRESSING, value: {{ quote . }}}
{{- end }}
{{- end }}
{{- with .root.Values.storage.encryption.mode }}
- {name: CLAAS_S3_ENCRYPTION, value: {{ quote . }}}
{{- end }}
{{- with .root.Values.storage.encryption.kmsKeyId }}
- {name: CLAAS_S3_KMS_KEY_ID, value: {{ quote . }}}
{{- end }}
{{- with .secret }}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_ACCESS_KEY_ID}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_SECRET_ACCESS_KEY}}
{{- end }}
{{- with .root.Values.storage.fileRoots }}
- {name: CLAAS_FILE_ROOTS, value: {{ join ":" . | quote }}}
{{- end }}
{{- end }}

{{- define "claas.modelSource" -}}
{{ .source | default (printf "hub:%s" .id) }}
{{- end }}

{{/*
Where a model lies in a container: dict root, model, mount. A fetched model has a folder of its own for each source, so
a changed source can never be taken for the old one.
*/}}
{{- define "claas.modelPath" -}}
{{- if .root.Values.fetch.enabled -}}
{{- $source := include "claas.modelSource" .model -}}
{{ .mount }}/{{ splitList "/" .model.id | last }}-{{ sha256sum $source | trunc 8 }}
{{- else -}}
{{ .mount }}
{{- end -}}
{{- end }}

{{- define "claas.studentPath" -}}
{{ include "claas.modelPath" (dict "root" . "model" .Values.model "mount" "/models/student") }}
{{- end }}

{{- define "claas.teacherPath" -}}
{{ include "claas.modelPath" (dict "root" . "model" .Values.teacher.model "mount" "/models/teacher") }}
{{- end }}

{{- define "claas.studentClaim" -}}
{{ .Values.model.volume.existingClaim | default (printf "%s-model" .Release.Name) }}
{{- end }}

{{- define "claas.teacherClaim" -}}
{{ .Values.teacher.model.volume.existingClaim | default (printf "%s-teacher-model" .Release.Name) }}
{{- end }}

{{- define "claas.teacherUrl" -}}
{{- if .Values.teacher.enabled -}}
http://{{ .Release.Name }}-teacher{{ if gt (int .Values.teacher.replicas) 1 }}-replicas{{ end }}.{{ .Release.Namespace }}.svc:8000
{{- else -}}
{{ .Values.teacher.url }}
{{- end -}}
{{- end }}

{{/* The init container that waits for the fetch Job: dict root, own, image, path. */}}
{{- define "claas.waitModel" -}}
{{- if .root.Values.fetch.enabled }}
initContainers:
- name: wait-model
  image: {{ include "claas.image" (dict "root" .root "name" .image) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [python3, -m, claas_store, wait-model, --target, {{ quote .path }}, --timeout, {{ .root.Values.fetch.waitSeconds | quote }}]
  {{- include "claas.containerSecurity" . | nindent 2 }}
  {{- with include "claas.extraEnv" (dict "root" .root "own" .own) | trim }}
  env:
  {{- . | nindent 2 }}
  {{- end }}
  resources:
    requests: {cpu: 50m, memory: 128Mi}
    limits: {memory: 512Mi}
  volumeMounts:
  - {name: model, mountPath: {{ .mount }}, readOnly: true}
  {{- include "claas.extraVolumeMounts" (dict "root" .root "own" .own) | nindent 2 }}
{{- end }}
{{- end }}

{{/* A pool's values: its own over poolDefaults. Argument: dict root, pool. */}}
{{- define "claas.pool" -}}
{{ toYaml (mergeOverwrite (deepCopy .root.Values.poolDefaults) .pool) }}
{{- end }}

{{/* The Pod template of a pool's workers: dict root, pool (merged). The operator adds names, labels and CLAAS_* of its own. */}}
{{- define "claas.workerTemplate" -}}
{{- $root := .root }}
{{- $pool := .pool }}
{{- $tenant := eq $pool.isolation "Namespace" }}
{{- $path := include "claas.studentPath" $root }}
metadata:
  labels:
    {{- include "claas.selector" (dict "root" $root "component" "worker") | nindent 4 }}
    {{- with $pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $pool.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ $tenant | ternary ($pool.serviceAccountName | default "default") (printf "%s-worker" $root.Release.Name) }}
  automountServiceAccountToken: true
  terminationGracePeriodSeconds: {{ $pool.terminationGracePeriodSeconds }}
  {{- include "claas.podSecurity" $root | nindent 2 }}
  {{- with include "claas.placement" $pool | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with include "claas.waitModel" (dict "root" $root "own" $pool "image" "worker" "path" $path "mount" "/models/student") | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
  - name: worker
    image: {{ include "claas.image" (dict "root" $root "name" "worker") }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    command: [python3, -m, claas_worker]
    {{- include "claas.containerSecurity" $root | nindent 4 }}
    env:
    - {name: CLAAS_MODEL_PATH, value: {{ quote $path }}}
    - {name: CLAAS_TEACHER_URL, value: {{ include "claas.teacherUrl" $root | quote }}}
    - {name: CLAAS_DEVICE, value: {{ $pool.device | quote }}}
    - {name: CLAAS_ENGINE, value: {{ $pool.engine | quote }}}
    - {name: CLAAS_RESIDENT_MIB, value: {{ $pool.residentMib | quote }}}
    {{- with $pool.compileCache }}
    - {name: CLAAS_COMPILE_CACHE, value: {{ . | quote }}}
    {{- end }}
    - {name: CLAAS_MAX_PROMPT_TOKENS, value: {{ $pool.maxPromptTokens | quote }}}
    - {name: CLAAS_MAX_RESPONSE_TOKENS, value: {{ $pool.maxResponseTokens | quote }}}
    {{- $secret := $tenant | ternary $pool.credentialsSecret (include "claas.credentialsSecret" $root) }}
    {{- include "claas.storageEnv" (dict "root" $root "secret" $secret) | trim | nindent 4 }}
    {{- with include "claas.extraEnv" (dict "root" $root "own" $pool) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    resources:
      {{- toYaml $pool.resources | nindent 6 }}
    volumeMounts:
    - {name: model, mountPath: /models/student, readOnly: true}
    {{- include "claas.extraVolumeMounts" (dict "root" $root "own" $pool) | nindent 4 }}
  volumes:
  - name: model
    persistentVolumeClaim:
      claimName: {{ $tenant | ternary $pool.modelClaim (include "claas.studentClaim" $root) }}
      readOnly: true
  {{- include "claas.extraVolumes" (dict "root" $root "own" $pool) | nindent 2 }}
{{- end }}

{{/*
The Pod template of operation Jobs (create an adapter, delete old versions, ...): no GPU, no access to the API.
Arguments: dict root, pool (merged; only where the Jobs run as the tenants of that pool: isolation Namespace).
*/}}
{{- define "claas.operationTemplate" -}}
{{- $root := .root }}
{{- $own := .root.Values.operations }}
{{- $account := printf "%s-operation" .root.Release.Name }}
{{- $secret := include "claas.credentialsSecret" .root }}
{{- $claim := include "claas.studentClaim" .root }}
{{- with .pool }}
{{- $account = .serviceAccountName | default "default" }}
{{- $secret = .credentialsSecret }}
{{- $claim = .modelClaim }}
{{- end }}
metadata:
  labels:
    {{- include "claas.selector" (dict "root" $root "component" "operation") | nindent 4 }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ $account }}
  automountServiceAccountToken: false
  {{- include "claas.podSecurity" $root | nindent 2 }}
  {{- with include "claas.placement" $own | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with include "claas.waitModel" (dict "root" $root "own" $own "image" "worker" "path" (include "claas.studentPath" $root) "mount" "/models/student") | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
  - name: operation
    image: {{ include "claas.image" (dict "root" $root "name" "worker") }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    command: [python3, -m, claas_store]
    {{- include "claas.containerSecurity" $root | nindent 4 }}
    env:
    {{- include "claas.storageEnv" (dict "root" $root "secret" $secret) | trim | nindent 4 }}
    {{- with include "claas.extraEnv" (dict "root" $root "own" $own) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    resources:
      {{- toYaml $own.resources | nindent 6 }}
    volumeMounts:
    - {name: model, mountPath: /models/student, readOnly: true}
    {{- include "claas.extraVolumeMounts" (dict "root" $root "own" $own) | nindent 4 }}
  volumes:
  - name: model
    persistentVolumeClaim: {claimName: {{ $claim }}, readOnly: true}
  {{- include "claas.extraVolumes" (dict "root" $root "own" $own) | nindent 2 }}
{{- end }}

{{/* The operator's settings file. Argument: root. */}}
{{- define "claas.settings" -}}
instance: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
owner:
  deployment: {{ .Release.Name }}-operator
{{- with .Values.watchNamespaces }}
watchNamespaces:
  {{- toYaml . | nindent 2 }}
{{- end }}
defaultPool: {{ .Values.defaultPool | default (first .Values.pools).name }}
defaultBaseModel: {{ .Values.model.id }}
storage:
  prefixes:
    {{- toYaml .Values.storage.prefixes | nindent 4 }}
  {{- with .Values.storage.forkPrefixes }}
  forkPrefixes:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- with include "claas.teacherUrl" . }}
teacher:
  url: {{ . }}
{{- end }}
pools:
{{- range .Values.pools }}
{{- $pool := include "claas.pool" (dict "root" $ "pool" .) | fromYaml }}
- name: {{ $pool.name }}
  isolation: {{ $pool.isolation }}
  baseModel: {{ $.Values.model.id }}
  minWorkers: {{ $pool.minWorkers }}
  maxWorkers: {{ $pool.maxWorkers }}
  lingerSeconds: {{ $pool.lingerSeconds }}
  maxRequests: {{ $pool.maxRequests }}
  startLimitSeconds: {{ $pool.startLimitSeconds }}
  batch: {{ $pool.batch }}
  scaleUpSeconds: {{ $pool.scaleUpSeconds }}
  {{- with $pool.queueName }}
  queueName: {{ . }}
  {{- end }}
  template:
    {{- include "claas.workerTemplate" (dict "root" $ "pool" $pool) | trim | nindent 4 }}
  {{- if eq $pool.isolation "Namespace" }}
  operationTemplate:
    {{- include "claas.operationTemplate" (dict "root" $ "pool" $pool) | trim | nindent 4 }}
  {{- end }}
{{- end }}
{{- with .Values.tenants }}
tenants:
  {{- toYaml . | nindent 2 }}
{{- end }}
operations:
  modelDir: {{ include "claas.studentPath" . }}
  backoffLimit: {{ .Values.operations.backoffLimit }}
  ttlSecondsAfterFinished: {{ .Values.operations.ttlSecondsAfterFinished }}
  activeDeadlineSeconds: {{ add .Values.operations.activeDeadlineSeconds (.Values.fetch.enabled | ternary .Values.fetch.waitSeconds 0) }}
  template:
    {{- include "claas.operationTemplate" (dict "root" .) | trim | nindent 4 }}
{{- with .Values.operator.timings }}
timings:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The shim's settings file: none of the operator's Pod templates. Argument: root. */}}
{{- define "claas.shimSettings" -}}
{{- $own := .Values.shim -}}
instance: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
{{- with .Values.watchNamespaces }}
watchNamespaces:
  {{- toYaml . | nindent 2 }}
{{- end }}
defaultBaseModel: {{ .Values.model.id }}
pools:
  {{- range .Values.pools }}
  {{ .name | quote }}: {{ $.Values.model.id }}
  {{- end }}
storage:
  prefixes:
    {{- toYaml .Values.storage.prefixes | nindent 4 }}
  {{- with .Values.storage.forkPrefixes }}
  forkPrefixes:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- with .Values.tenants }}
tenants:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "claas.teacherUrl" . }}
teacher:
  url: {{ . }}
{{- end }}
auth:
  mode: {{ $own.auth.mode | quote }}
  cacheSeconds: {{ $own.auth.cacheSeconds }}
  {{- with $own.auth.namespace }}
  namespace: {{ . }}
  {{- end }}
  {{- with $own.auth.audiences }}
  audiences:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if eq $own.auth.mode "ApiKey" }}
  keysNamespace: {{ $own.auth.keysNamespace | default .Release.Namespace }}
  {{- end }}
limits:
  maxBodyBytes: {{ int64 $own.limits.maxBodyBytes }}
  maxSamples: {{ int $own.limits.maxSamples }}
  requestsPerMinute: {{ int64 $own.limits.requestsPerMinute }}
  burst: {{ int $own.limits.burst }}
waitSeconds: {{ $own.waitSeconds }}
maxWaitSeconds: {{ $own.maxWaitSeconds }}
requestTtlSeconds: {{ int64 $own.requestTtlSeconds }}
{{- end }}

{{/* What the schema cannot say: values that must fit together. Argument: root. */}}
{{- define "claas.check" -}}
{{- /* Nothing is found by `helm template`; the operator looks as well, and leaves alone what an older release serves. */ -}}
{{- $own := include "claas.clusterName" (dict "root" . "name" "operator") }}
{{- range (lookup "rbac.authorization.k8s.io/v1" "ClusterRole" "" "").items }}
{{- $theirs := index (.metadata.annotations | default dict) "claas.dev/namespaces" }}
{{- if and $theirs (ne .metadata.name $own) }}
{{- if or (eq $theirs "*") (not $.Values.watchNamespaces) }}
{{- fail (printf "watchNamespaces: another release (ClusterRole %s) serves %s, and of two that serve all namespaces, or one that does and one that does not, the older would have everything; name the namespaces of both" .metadata.name (eq $theirs "*" | ternary "all namespaces" $theirs)) }}
{{- end }}
{{- range splitList "," $theirs }}
{{- if has . $.Values.watchNamespaces }}
{{- fail (printf "watchNamespaces: %s is another release's; a namespace has one operator" .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if gt (len .Release.Name) 25 }}
{{- fail (printf "the release's name %s is too long for the names of Jobs: at most 25 characters" .Release.Name) }}
{{- end }}
{{- $names := list }}
{{- range $i, $given := .Values.pools }}
{{- $pool := include "claas.pool" (dict "root" $ "pool" $given) | fromYaml }}
{{- if has $pool.name $names }}
{{- fail (printf "pools[%d].name: %s is the name of another pool; give each its own" $i $pool.name) }}
{{- end }}
{{- $names = append $names $pool.name }}
{{- if gt (add (len $.Release.Name) (len $pool.name)) 47 }}
{{- fail (printf "pools[%d].name: %s and the release's name %s are too long for the names of Jobs: at most 47 characters together" $i $pool.name $.Release.Name) }}
{{- end }}
{{- if gt (int $pool.minWorkers) (int $pool.maxWorkers) }}
{{- fail (printf "pools[%d] (%s): minWorkers %v is more than maxWorkers %v" $i $pool.name $pool.minWorkers $pool.maxWorkers) }}
{{- end }}
{{- if and (eq $pool.isolation "Namespace") (gt (int $pool.minWorkers) 0) }}
{{- fail (printf "pools[%d] (%s): minWorkers needs isolation Shared, or every namespace would hold a GPU" $i $pool.name) }}
{{- end }}
{{- if and (eq $pool.isolation "Namespace") (not $pool.modelClaim) }}
{{- fail (printf "pools[%d] (%s): isolation Namespace needs modelClaim, a claim in each tenant's namespace that holds the model" $i $pool.name) }}
{{- end }}
{{- end }}
{{- if not (has (.Values.defaultPool | default (first $names)) $names) }}
{{- fail (printf "defaultPool: %s is none of the pools (%s)" .Values.defaultPool (join ", " $names)) }}
{{- end }}
{{- $credentials := .Values.storage.credentials }}
{{- if ne (empty $credentials.accessKeyId) (empty $credentials.secretAccessKey) }}
{{- fail "storage.credentials: accessKeyId and secretAccessKey go together; set both or neither" }}
{{- end }}
{{- if and $credentials.existingSecret $credentials.accessKeyId }}
{{- fail "storage.credentials: set either existingSecret or accessKeyId and secretAccessKey, not both" }}
{{- end }}
{{- range $i, $root := .Values.storage.fileRoots }}
{{- if or (contains "/./" (printf "%s/" $root)) (contains "/../" (printf "%s/" $root)) (contains "//" $root) }}
{{- fail (printf "storage.fileRoots[%d]: %s has an empty, '.' or '..' segment; name the folder itself" $i $root) }}
{{- end }}
{{- end }}
{{- range $list := list "prefixes" "forkPrefixes" }}
{{- range $i, $prefix := index $.Values.storage $list }}
{{- if or (contains "/./" $prefix.uri) (contains "/../" $prefix.uri) }}
{{- fail (printf "storage.%s[%d].uri: %s has a '.' or '..' segment; name the folder itself" $list $i $prefix.uri) }}
{{- end }}
{{- if hasPrefix "file://" $prefix.uri }}
{{- $below := false }}
{{- range $root := $.Values.storage.fileRoots }}
{{- $below = or $below (hasPrefix (printf "file://%s/" (trimSuffix "/" $root)) $prefix.uri) }}
{{- end }}
{{- if not $below }}
{{- fail (printf "storage.%s[%d].uri: %s needs storage.fileRoots, which names the folders that file:// may reach" $list $i $prefix.uri) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.storage.encryption.kmsKeyId (ne .Values.storage.encryption.mode "aws:kms") }}
{{- fail "storage.encryption.kmsKeyId needs mode aws:kms: with any other nothing would use the key" }}
{{- end }}
{{- $auth := .Values.shim.auth }}
{{- if and .Values.shim.enabled (ne (eq $auth.mode "None") (not (empty $auth.namespace))) }}
{{- fail "shim.auth: mode None (no authentication) needs namespace, the one tenant that every caller is; no other mode has it" }}
{{- end }}
{{- if gt (float64 .Values.shim.waitSeconds) (float64 .Values.shim.maxWaitSeconds) }}
{{- fail (printf "shim.waitSeconds: %v is more than shim.maxWaitSeconds %v" .Values.shim.waitSeconds .Values.shim.maxWaitSeconds) }}
{{- end }}
{{- if and .Values.teacher.enabled .Values.teacher.url }}
{{- fail "teacher.url is for a teacher elsewhere: set teacher.enabled to false with it" }}
{{- end }}
{{- end }}
