import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { startNewChat, update } from "../chat/persistence";
import { current, knowledgeBases, models } from "../chat/state";
import { Dialog } from "../components/dialog";
import { Icon } from "../components/icons";
import { fileSize, number, t } from "../i18n";
import { errorText } from "../errorText";
import { go, href, route } from "../router";
import { Search } from "./search";
import {
  actionProblem,
  createKnowledgeBase,
  dismiss,
  files,
  isIngesting,
  refresh,
  refreshFiles,
  refreshProblem,
  removeFile,
  removeKnowledgeBase,
  retry,
  upload,
  uploads,
  type FileState,
} from "./state";

const POLL_INTERVAL = 1000; // ms, while files are being ingested

export function DocumentsView() {
  const creating = useSignal(false);
  useEffect(() => {
    actionProblem.value = null;
  }, [route.value.id, creating.value]);
  const problem = (!creating.value && actionProblem.value) || refreshProblem.value;
  const all = knowledgeBases.value;
  const open = all.find((each) => each.id === route.value.id) ?? all[0] ?? null;
  return (
    <div class="page">
      <div class="row spread">
        <h1>{t("documents")}</h1>
        <button type="button" onClick={() => (creating.value = true)}>
          <Icon name="plus" /> {t("newKnowledgeBase")}
        </button>
      </div>
      {problem && (
        <div class="problem" role="alert">
          {problem}
        </div>
      )}
      {all.length > 0 && (
        <ul class="tabs">
          {all.map((each) => (
            <li key={each.id}>
              <a href={href("documents", each.id)} aria-current={each === open ? "page" : undefined}>
                {each.id}
              </a>
            </li>
          ))}
        </ul>
      )}
      {open ? (
        <KnowledgeBaseView key={open.id} id={open.id} />
      ) : (
        <div class="empty">
          <h2>{t("noKnowledgeBases")}</h2>
          <p>{t("noKnowledgeBasesText")}</p>
          <button type="button" class="primary" onClick={() => (creating.value = true)}>
            {t("newKnowledgeBase")}
          </button>
        </div>
      )}
      {creating.value && <CreateDialog onClose={() => (creating.value = false)} />}
    </div>
  );
}

function CreateDialog(props: { onClose: () => void }) {
  const name = useSignal("");
  const embedders = models.value.filter((each) => each.kind === "embedding");
  const embedder = useSignal(embedders[0]?.id ?? "");
  const submit = async (event: Event) => {
    event.preventDefault();
    const created = await createKnowledgeBase(name.value.trim(), embedder.value || null);
    if (created === null) return;
    props.onClose();
    go("documents", created.id);
  };
  return (
    <Dialog title={t("newKnowledgeBase")} onClose={props.onClose}>
      <form class="form" onSubmit={submit}>
        <label>
          <span>{t("name")}</span>
          <input
            autofocus
            required
            maxLength={64}
            value={name.value}
            onInput={(event) => (name.value = event.currentTarget.value)}
          />
        </label>
        <label>
          <span>{t("searchMode")}</span>
          <select
            value={embedder.value}
            onChange={(event) => (embedder.value = event.currentTarget.value)}
          >
            <option value="">{t("lexicalSearch")}</option>
            {embedders.map((each) => (
              <option key={each.id} value={each.id}>
                {t("hybridSearch", { name: each.id })}
              </option>
            ))}
          </select>
        </label>
        {actionProblem.value && (
          <div class="problem" role="alert">
            {actionProblem.value}
          </div>
        )}
        <div class="editor-row">
          <button type="button" onClick={props.onClose}>
            {t("cancel")}
          </button>
          <button type="submit" class="primary">
            {t("create")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

function KnowledgeBaseView(props: { id: string }) {
  const { id } = props;
  const dragging = useSignal(false);
  const deleting = useSignal<"knowledgeBase" | FileState | null>(null);
  const picker = useRef<HTMLInputElement>(null);
  useEffect(() => {
    void refreshFiles(id);
  }, [id]);
  useEffect(() => {
    let unmounted = false;
    let timer = 0;
    // Polling continues after errors, and does not depend on how often the page is rendered.
    const poll = async () => {
      if (isIngesting()) await refresh(id);
      if (!unmounted) timer = window.setTimeout(poll, POLL_INTERVAL);
    };
    timer = window.setTimeout(poll, POLL_INTERVAL);
    return () => {
      unmounted = true;
      clearTimeout(timer);
    };
  }, [id]);
  const knowledgeBase = knowledgeBases.value.find((each) => each.id === id);
  const drop = (event: DragEvent) => {
    event.preventDefault();
    dragging.value = false;
    if (event.dataTransfer) upload(id, event.dataTransfer.files);
  };
  const pick = () => {
    const { current: input } = picker;
    if (input?.files) upload(id, input.files);
    if (input) input.value = "";
  };
  const ask = () => {
    startNewChat();
    update({ knowledge_base: id });
  };
  const ownUploads = uploads.value.filter((each) => each.knowledgeBase === id);
  return (
    <>
      <div class="row">
        <button
          type="button"
          class="primary"
          disabled={!files.value.some((file) => file.status === "ready")}
          onClick={ask}
        >
          <Icon name="chat" /> {t("askDocuments")}
        </button>
        <span class="note grow">
          {knowledgeBase?.embedder ? t("hybridSearch", { name: knowledgeBase.embedder }) : t("lexicalSearch")}
        </span>
        <button type="button" onClick={() => (deleting.value = "knowledgeBase")}>
          <Icon name="trash" /> {t("deleteKnowledgeBase")}
        </button>
      </div>
      {knowledgeBase?.error && (
        <div class="problem" role="alert">
          {errorText(knowledgeBase.error, knowledgeBase.code)}
        </div>
      )}
      <label
        class={dragging.value ? "drop over" : "drop"}
        onDragOver={(event) => {
          event.preventDefault();
          dragging.value = true;
        }}
        onDragLeave={() => (dragging.value = false)}
        onDrop={drop}
      >
        <Icon name="documents" />
        <span>{t("dropFiles")}</span>
        <small>{t("formats")}</small>
        <input ref={picker} class="sr-only" type="file" multiple aria-label={t("dropFiles")} onChange={pick} />
      </label>
      <ul class="files" aria-label={t("files")}>
        {ownUploads.map((upload) => (
          <li key={upload.key} class={upload.problem ? "failed" : ""}>
            <span class="file-name">{upload.file.name}</span>
            <span class="file-state" role={upload.problem ? "alert" : undefined}>
              {upload.problem ?? <progress value={upload.progress} aria-label={t("uploading")} />}
            </span>
            {upload.problem && (
              <button type="button" onClick={() => retry(upload)}>
                {t("retry")}
              </button>
            )}
            {upload.problem && (
              <button
                type="button"
                class="quiet"
                aria-label={`${t("close")}: ${upload.file.name}`}
                onClick={() => dismiss(upload)}
              >
                <Icon name="close" />
              </button>
            )}
          </li>
        ))}
        {files.value.map((file) => (
          <li key={file.id} class={file.status}>
            <span class="file-name">
              <bdi>{file.name}</bdi>
            </span>
            <span class="file-state">
              <FileStatus file={file} />
            </span>
            <button
              type="button"
              class="quiet"
              aria-label={`${t("delete")}: ${file.name}`}
              title={t("delete")}
              onClick={() => (deleting.value = file)}
            >
              <Icon name="trash" />
            </button>
          </li>
        ))}
      </ul>
      {files.value.some((file) => file.status === "ready") && <Search knowledgeBase={id} />}
      {deleting.value && (
        <Confirm
          name={deleting.value === "knowledgeBase" ? id : deleting.value.name}
          onClose={() => (deleting.value = null)}
          onConfirm={() => {
            const target = deleting.value;
            deleting.value = null;
            if (target === "knowledgeBase") {
              void removeKnowledgeBase(id).then((removed) => {
                if (!removed) return;
                if (current.value.knowledge_base === id) update({ knowledge_base: null });
                if (route.value.view === "documents" && route.value.id === id) go("documents");
              });
            } else if (target) void removeFile(id, target);
          }}
        />
      )}
    </>
  );
}

function FileStatus(props: { file: FileState }) {
  const { file } = props;
  switch (file.status) {
    case "ready":
      return (
        <>
          {`${fileSize(file.bytes)} · ${t("passageCount", { n: number(file.chunks) })}`}
          {file.error && <span class="partial"><FileError file={file} /></span>}
        </>
      );
    case "failed":
      return <FileError file={file} />;
    case "embedding":
      return (
        <>
          {t("embedding")}{" "}
          <progress max={file.chunks || 1} value={file.embedded} aria-label={t("embedding")} />
        </>
      );
    default:
      return <>{t(file.status)}</>;
  }
}

/** The error; the server's message, with its figures and line numbers, is the tooltip. */
function FileError(props: { file: FileState }) {
  const { error, code } = props.file;
  const message = error ?? "";
  return <span title={message}>{errorText(message, code)}</span>;
}

function Confirm(props: { name: string; onConfirm: () => void; onClose: () => void }) {
  return (
    <Dialog title={t("confirmDeletion")} onClose={props.onClose}>
      <p>{props.name}</p>
      <div class="editor-row">
        <button type="button" onClick={props.onClose}>
          {t("cancel")}
        </button>
        <button type="button" class="danger" onClick={props.onConfirm}>
          {t("delete")}
        </button>
      </div>
    </Dialog>
  );
}
