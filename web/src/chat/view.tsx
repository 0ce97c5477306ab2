import { useSignal } from "@preact/signals";
import { Fragment } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { connected, features } from "../api";
import { Icon } from "../components/icons";
import { list, t } from "../i18n";
import { href } from "../router";
import { answer, send } from "./generation";
import { Composer } from "./composer";
import { Message } from "./message";
import {
  canGenerate, connect, countContextTokens, current, generating, languageWarning, leftOut, model,
  models, problem, selectModel, visibleNodes,
} from "./state"; // prettier-ignore
import { isEmpty, type Node } from "../tree";
import { ChatSettings } from "./chatSettings";

const END_MARGIN = 8; // px from the end that count as at the end

export function ChatView() {
  const settingsOpen = useSignal(false);
  const scrolledUp = useSignal(false);
  const scroller = useRef<HTMLDivElement>(null);
  const lastTop = useRef(0);
  const toEnd = () => {
    const { current: element } = scroller;
    if (element) element.scrollTop = element.scrollHeight;
  };
  const onScroll = () => {
    const { current: element } = scroller;
    if (element === null) return;
    // Scrolling up stops following the answer, even by a pixel; growth of the text does not.
    const below = element.scrollHeight - element.scrollTop - element.clientHeight;
    if (below <= END_MARGIN) scrolledUp.value = false;
    else if (element.scrollTop < lastTop.current) scrolledUp.value = true;
    lastTop.current = element.scrollTop;
  };
  useEffect(() => {
    scrolledUp.value = false;
    toEnd();
  }, [current.value.id, visibleNodes.value.length]);
  useEffect(() => {
    if (!scrolledUp.value) toEnd();
  });
  useEffect(() => {
    if (!generating.value) void countContextTokens();
  }, [current.value.id, generating.value, model.value?.id, visibleNodes.value.length]);
  const last = visibleNodes.value.at(-1);
  const unanswered = !generating.value && last ? unansweredQuestion(last) : null;
  return (
    <div class="chat">
      <div class="scroll" ref={scroller} onScroll={onScroll}>
        <div class="column" aria-busy={generating.value}>
          {visibleNodes.value.length === 0 ? (
            <Empty />
          ) : (
            visibleNodes.value.map((node, i) => (
              <Fragment key={node.id}>
                {i > 0 && i === leftOut.value && <p class="left-out">{t("leftOut")}</p>}
                <Message node={node} />
              </Fragment>
            ))
          )}
          <Warning />
          {(problem.value || unanswered) && (
            <div class="problem" role={problem.value ? "alert" : undefined}>
              <span>{problem.value ?? t("unanswered")}</span>
              {!connected.value && (
                <button type="button" onClick={() => void connect()}>
                  {t("retry")}
                </button>
              )}
              {connected.value && unanswered && (
                <button type="button" onClick={() => void answer(unanswered)}>
                  {t("retry")}
                </button>
              )}
            </div>
          )}
        </div>
      </div>
      <div class="foot">
        {scrolledUp.value && (
          <button type="button" class="to-end round" aria-label={t("scrollToEnd")} onClick={toEnd}>
            <Icon name="down" />
          </button>
        )}
        <Composer onSettings={() => (settingsOpen.value = true)} />
      </div>
      {settingsOpen.value && <ChatSettings onClose={() => (settingsOpen.value = false)} />}
    </div>
  );
}

/** The model lacks the language of the question; another one has it. */
function Warning() {
  const warning = languageWarning.value;
  if (warning === null || warning.conversation !== current.value.id) return null;
  const language = t(warning.language === "zh" ? "inChinese" : "inEnglish");
  const close = () => (languageWarning.value = null);
  return (
    <div class="notice" role="status">
      <span>{t("lacksLanguage", { name: warning.lacks, other: warning.model, language })}</span>
      <span>
        {models.value.some((each) => each.id === warning.model) ? (
          <button type="button" onClick={() => (selectModel(warning.model), close())}>
            {t("switchTo", { name: warning.model })}
          </button>
        ) : (
          features.value.catalogue && (
            <a class="button" href={href("models", warning.model)} onClick={close}>
              {t("switchTo", { name: warning.model })}
            </a>
          )
        )}
        <button type="button" class="quiet" aria-label={t("close")} onClick={close}>
          <Icon name="close" />
        </button>
      </span>
    </div>
  );
}

/** The question at the end of a conversation; an empty answer was cut off by closing the page. */
function unansweredQuestion(last: Node): string | null {
  if (last.role === "user") return last.id;
  return isEmpty(last) ? last.parent : null;
}

function Empty() {
  if (connected.value && features.value.catalogue && model.value === null) {
    return (
      <div class="empty">
        <h1>{t("noModelYet")}</h1>
        <p>
          <a class="button" href={href("models")}>
            {t("chooseModel")}
          </a>
        </p>
        {features.value.knowledgeBases && (
          <p>
            <a href={href("documents")}>{t("quotedWithout")}</a>
          </p>
        )}
      </div>
    );
  }
  return (
    <div class="empty">
      {/* Over HTTP from another machine, which browsers do not call secure, it does leave. */}
      <h1>{t(isSecureContext ? "emptyTitle" : "openTitle")}</h1>
      <p>{t(isSecureContext ? "emptyText" : "openText")}</p>
      <div class="examples">
        {list("examples").map((text) => (
          <button key={text} type="button" disabled={!canGenerate.value} onClick={() => void send(text)}>
            {text}
          </button>
        ))}
      </div>
    </div>
  );
}
