import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { met } from "../api";
import { Icon } from "../components/icons";
import { list, t } from "../i18n";
import { answer, send } from "./asking";
import { Composer } from "./composer";
import { Message } from "./message";
import { answering, begin, current, free, measure, model, problem, running, shown } from "./state";
import { isEmpty, type Node } from "../tree";
import { Tuning } from "./tuning";

const END = 8; // pixels: nearer to the end than this is at the end

export function ChatView() {
  const tuning = useSignal(false);
  const away = useSignal(false);
  const scroller = useRef<HTMLDivElement>(null);
  const top = useRef(0);
  const toEnd = () => {
    const { current: element } = scroller;
    if (element) element.scrollTop = element.scrollHeight;
  };
  const onScroll = () => {
    const { current: element } = scroller;
    if (element === null) return;
    // Whoever scrolls up by the least is not pulled down again; what grows below moves nobody.
    if (element.scrollHeight - element.scrollTop - element.clientHeight <= END) away.value = false;
    else if (element.scrollTop < top.current) away.value = true;
    top.current = element.scrollTop;
  };
  useEffect(() => {
    away.value = false;
    toEnd();
  }, [current.value.id, shown.value.length]);
  useEffect(() => {
    if (!away.value) toEnd();
  });
  useEffect(() => {
    if (running.value === null) void measure();
  }, [current.value.id, running.value, model.value?.id, shown.value.length]);
  const last = shown.value.at(-1);
  const unanswered = running.value === null && last ? questionOf(last) : null;
  return (
    <div class="chat">
      <div class="scroll" ref={scroller} onScroll={onScroll}>
        <div class="column" aria-busy={answering.value}>
          {shown.value.length === 0 ? (
            <Empty />
          ) : (
            shown.value.map((node) => <Message key={node.id} node={node} />)
          )}
          {(problem.value || unanswered) && (
            <div class="problem" role={problem.value ? "alert" : undefined}>
              <span>{problem.value ?? t("unanswered")}</span>
              {!met.value && (
                <button type="button" onClick={() => void begin()}>
                  {t("retry")}
                </button>
              )}
              {met.value && unanswered && (
                <button type="button" onClick={() => void answer(unanswered)}>
                  {t("retry")}
                </button>
              )}
            </div>
          )}
        </div>
      </div>
      <div class="foot">
        {away.value && (
          <button type="button" class="to-end round" aria-label={t("toEnd")} onClick={toEnd}>
            <Icon name="down" />
          </button>
        )}
        <Composer onTune={() => (tuning.value = true)} />
      </div>
      {tuning.value && <Tuning onClose={() => (tuning.value = false)} />}
    </div>
  );
}

/** The question that a conversation ends with, also where the page went amid its answer. */
function questionOf(last: Node): string | null {
  if (last.role === "user") return last.id;
  return isEmpty(last) ? last.parent : null;
}

function Empty() {
  return (
    <div class="empty">
      <h1>{t("emptyTitle")}</h1>
      <p>{t("emptyText")}</p>
      <div class="examples">
        {list("examples").map((text) => (
          <button key={text} type="button" disabled={!free.value} onClick={() => void send(text)}>
            {text}
          </button>
        ))}
      </div>
    </div>
  );
}
