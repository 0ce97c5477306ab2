import { useSignal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import type { Citation, Hit } from "../api";
import { Icon } from "../components/icons";
import { Markdown } from "../components/markdown";
import { Inspector, sourceLabel, SourcePanel } from "../components/sources";
import { number, t } from "../i18n";
import { copyText } from "../platform";
import { siblings, type Node } from "../tree";
import { continueAnswer, edit, regenerate } from "./generation";
import { isComposing } from "./composer";
import { DeleteMessage } from "./deletion";
import { Details } from "./details";
import { select } from "./persistence";
import { canGenerate, continuable, current, generating, running, thoughts, usage } from "./state";

const SHORTEST = 0.01; // s between first and last token: answers that arrive at once have no rate

export function Message(props: { node: Node }) {
  const { node } = props;
  return (
    <article class={`message ${node.role}`} aria-label={t(node.role === "user" ? "you" : "assistant")}>
      {node.role === "user" ? <Question node={node} /> : <Answer node={node} />}
    </article>
  );
}

function Question(props: { node: Node }) {
  const { node } = props;
  const editing = useSignal(false);
  if (editing.value) return <Editor node={node} onDone={() => (editing.value = false)} />;
  return (
    <>
      <div class="bubble" dir="auto">
        {node.content}
      </div>
      <div class="actions">
        <Versions node={node} />
        <Copy text={node.content} />
        <button
          type="button"
          class="quiet"
          aria-label={t("edit")}
          title={t("edit")}
          disabled={generating.value}
          onClick={() => (editing.value = true)}
        >
          <Icon name="edit" />
        </button>
        <DeleteMessage node={node} />
      </div>
    </>
  );
}

function Editor(props: { node: Node; onDone: () => void }) {
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    area.current?.focus();
    area.current?.setSelectionRange(-1, -1);
  }, []);
  const submit = (event: Event) => {
    event.preventDefault();
    const text = area.current?.value.trim();
    if (!text || !canGenerate.value) return;
    props.onDone();
    void edit(props.node, text);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) submit(event);
    if (event.key === "Escape") props.onDone();
  };
  return (
    <form class="editor" onSubmit={submit}>
      <textarea ref={area} rows={4} aria-label={t("edit")} onKeyDown={onKeyDown}>
        {props.node.content}
      </textarea>
      <div class="editor-row">
        <button type="button" onClick={props.onDone}>
          {t("cancel")}
        </button>
        <button type="submit" class="primary" disabled={!canGenerate.value}>
          {t("send")}
        </button>
      </div>
    </form>
  );
}

/** Folded, unless the user opens it, also while it grows. */
function Thought({ node, text, growing }: { node: Node; text: string; growing: boolean }) {
  const open = useSignal(false);
  const took = thoughts.value.get(node.id);
  const parts = [
    t("reasoning"),
    took && t("inSeconds", { n: number(took.seconds, took.seconds < 10 ? 1 : 0) }),
    took && took.tokens !== null && t("tokens", { n: number(took.tokens) }),
  ];
  return (
    <details class="thought" open={open.value} onToggle={(event) => (open.value = event.currentTarget.open)}>
      <summary>{growing ? t("thinking") : parts.filter(Boolean).join(" · ")}</summary>
      <Markdown text={text} finished={!growing} />
    </details>
  );
}

function Answer(props: { node: Node }) {
  const { node } = props;
  const opened = useSignal<Citation | Hit | null>(null);
  const inspecting = useSignal(false);
  const detailed = useSignal(false);
  const growing = running.value.has(node.id);
  const knowledgeBase = node.retrieval?.knowledge_base ?? current.value.knowledge_base;
  const stats = usage.value.get(node.id);
  // An answer that cites nothing shows what was found.
  const cited = Boolean(node.citations?.length);
  const sources = (cited ? node.citations : !growing && provisionalCitations(node)) || [];
  return (
    <>
      {node.reasoning && (
        <Thought node={node} text={node.reasoning} growing={growing && !node.content} />
      )}
      {node.content ? (
        <Markdown
          text={node.content}
          finished={!growing}
          citations={node.citations ?? provisionalCitations(node)}
          onCite={(citation) => (opened.value = citation)}
        />
      ) : (
        growing && !node.reasoning && <span class="waiting" aria-hidden="true" />
      )}
      {sources.length > 0 && (
        <ul class="citations" aria-label={t(cited ? "sources" : "passages")}>
          {!cited && <li class="note">{t("passagesFound")}</li>}
          {sources.map((each) => (
            <li key={each.number}>
              <button
                type="button"
                class={cited ? "" : "uncited"}
                aria-label={t("openSource", { n: each.number, doc: sourceLabel(each) })}
                onClick={() => (opened.value = each)}
              >
                <b>{each.number}</b> {sourceLabel(each)}
              </button>
            </li>
          ))}
        </ul>
      )}
      {!growing && node.retrieval?.asked === false && (
        <button type="button" disabled={generating.value} onClick={() => void regenerate(node, true)}>
          {t("askAnyway")}
        </button>
      )}
      {!growing && (
        <div class="actions">
          <Versions node={node} />
          <Copy text={node.content} />
          <button
            type="button"
            class="quiet"
            aria-label={t("regenerate")}
            title={t("regenerate")}
            disabled={generating.value}
            onClick={() => void regenerate(node)}
          >
            <Icon name="again" />
          </button>
          {continuable.value.has(node.id) && current.value.selected === node.id && (
            <button
              type="button"
              class="quiet"
              aria-label={t("continueAnswer")}
              title={t("continueAnswer")}
              disabled={generating.value}
              onClick={() => void continueAnswer(node)}
            >
              <Icon name="forward" /> {t("continueAnswer")}
            </button>
          )}
          <DeleteMessage node={node} />
          {node.retrieval && (
            <button
              type="button"
              class="quiet"
              aria-label={t("retrievalDetails")}
              title={t("retrievalDetails")}
              onClick={() => (inspecting.value = true)}
            >
              <Icon name="search" />
            </button>
          )}
          <button
            type="button"
            class="quiet"
            aria-label={t("answerDetails")}
            title={t("answerDetails")}
            onClick={() => (detailed.value = true)}
          >
            <Icon name="info" />
          </button>
          <span class="metadata">
            {node.model}
            {stats && ` · ${t("tokens", { n: number(stats.usage.completion_tokens) })}`}
            {stats && stats.usage.completion_tokens > 1 && stats.seconds >= SHORTEST &&
              ` · ${t("perSecond", { n: number((stats.usage.completion_tokens - 1) / stats.seconds, 1) })}`}
            {node.finish_reason === "stopped" && ` · ${t("stopped")}`}
            {node.finish_reason === "error" && ` · ${t("interrupted")}`}
            {node.finish_reason === "interrupted" && ` · ${t("serverEnded")}`}
            {node.finish_reason === "size_limit" && ` · ${t("sizeLimit")}`}
            {node.finish_reason === "length" && ` · ${t("lengthLimit")}`}
          </span>
        </div>
      )}
      {detailed.value && <Details node={node} onClose={() => (detailed.value = false)} />}
      {inspecting.value && node.retrieval && (
        <Inspector
          retrieval={node.retrieval}
          onOpen={(hit) => (opened.value = hit)}
          onClose={() => (inspecting.value = false)}
        />
      )}
      {opened.value && knowledgeBase !== null && (
        <SourcePanel knowledgeBase={knowledgeBase} citation={opened.value} onClose={() => (opened.value = null)} />
      )}
    </>
  );
}

/** Citations arrive at the end; while an answer streams, every retrieved passage may be cited. */
function provisionalCitations(node: Node): Citation[] | null {
  return node.retrieval?.hits.map((hit, i) => ({ ...hit, number: hit.number ?? i + 1 })) ?? null;
}

function Versions(props: { node: Node }) {
  const all = siblings(current.value, props.node);
  const index = all.findIndex((each) => each.id === props.node.id);
  if (all.length < 2) return null;
  const move = (by: number) => {
    const other = all[index + by];
    if (other) select(other);
  };
  return (
    <span class="versions" role="group" aria-label={t("versionOf", { i: index + 1, n: all.length })}>
      <button
        type="button"
        class="quiet"
        aria-label={t("previousVersion")}
        disabled={index === 0 || generating.value}
        onClick={() => move(-1)}
      >
        <Icon name="left" />
      </button>
      <span aria-hidden="true">
        {index + 1}/{all.length}
      </span>
      <button
        type="button"
        class="quiet"
        aria-label={t("nextVersion")}
        disabled={index === all.length - 1 || generating.value}
        onClick={() => move(1)}
      >
        <Icon name="right" />
      </button>
    </span>
  );
}

function Copy(props: { text: string }) {
  const copied = useSignal(false);
  const copy = async () => {
    await copyText(props.text);
    copied.value = true;
    setTimeout(() => (copied.value = false), 1500);
  };
  const label = copied.value ? t("copied") : t("copy");
  return (
    <button type="button" class="quiet" aria-label={label} title={label} onClick={copy}>
      <Icon name={copied.value ? "check" : "copy"} />
    </button>
  );
}
